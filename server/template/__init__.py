"""The room that puts the security template first and turns a request into exact token ids."""
