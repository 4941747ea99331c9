"""Text to token shards: sources, filters, encoding in partitions, and the import of other formats. Called, it is
`regpt.api.data.prepare`."""

import sys

import regpt

sys.modules[__name__].__class__ = regpt.CallablePackage
