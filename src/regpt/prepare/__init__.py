"""Text to token shards, and the import of other formats. Called, it is `regpt.api.data.prepare`. The modules in order:

settings.py                options that shape the tokens
listing.py  sources.py     names, folders, globs and addresses → files; what is left out is counted
named.py  pydocs.py        sets with a name, stdin, and the list of everything that a command reads
readers.py  parquet.py  json_rows.py  documents.py      a file by its suffix → rows → documents
partition.py  encode.py    sources → partitions → files of tokens and tables of documents
workers.py                 partitions encoded here or in a pool of processes
split.py                   which documents are held out
ngrams.py  decontaminate.py  dedup.py      documents that hold evaluation items or repeat earlier ones
shards.py  records.py      encoded partitions → shards, and the manifest's records
work.py  prepare.py        the folder `.work`; one job from sources to manifest
token_files.py  importer.py      token files of other projects → shards
"""

import sys

import regpt

sys.modules[__name__].__class__ = regpt.CallablePackage
