"""Servers of files on this machine, for sources with an address."""

from remote_servers import hub, web  # noqa: F401
