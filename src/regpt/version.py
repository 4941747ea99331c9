"""The version, made from git's tags when the package is built (setuptools-scm)."""

from importlib.metadata import PackageNotFoundError, version

UNKNOWN = "0+unknown"  # PEP 440's lowest, with a label that says why


def installed_version() -> str:
    """Version of the installed package; `UNKNOWN` for a source tree that was not installed."""
    try:
        return version("regpt")
    except PackageNotFoundError:
        return UNKNOWN
