"""A real PostgreSQL for tests of the store."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest


class Postgres:
    """A PostgreSQL of our own on a unix socket; it refuses to run as root, so root lends it another user."""

    def __init__(self):
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
        if not found:
            pytest.fail("PostgreSQL is not installed; run: apt-get install postgresql")
        self.bin = found[-1]
        self.user = "postgres" if os.geteuid() == 0 else None
        self.folder = Path(tempfile.mkdtemp(prefix="sr-pg-"))
        if self.user is not None:
            shutil.chown(self.folder, self.user)
        self.run("initdb", "-D", str(self.folder / "data"), "-U", "tester", "-A", "trust", "--no-sync")
        self.start()
        self.num_databases = 0

    def start(self):
        options = f"-c listen_addresses='' -c unix_socket_directories={self.folder} -c fsync=off"
        self.run(
            "pg_ctl", "-D", str(self.folder / "data"), "-o", options, "-l", str(self.folder / "log"), "-w", "start"
        )

    def halt(self):
        self.run("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop")

    def run(self, program, *arguments, **changes):
        done = subprocess.run(
            [str(self.bin / program), *arguments], user=self.user, cwd="/", capture_output=True, check=False, **changes
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def new_database(self):
        self.num_databases += 1
        name = f"test{self.num_databases}"
        self.run("createdb", "-h", str(self.folder), "-U", "tester", name)
        return name

    def url(self, name):
        return f"postgresql+psycopg://tester@/{name}?host={self.folder}"

    def stop(self):
        self.halt()
        shutil.rmtree(self.folder)
