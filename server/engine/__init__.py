"""One model's engine: started, watched and spoken to; rooms above see only `ports.Engine`."""
