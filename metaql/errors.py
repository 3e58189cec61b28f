"""Every error MetaQL raises on purpose, by who must act.

::

    MetaQLError
    ├── QueryError              the SQL is wrong: change the query
    │   ├── UnknownNameError        a relation, column, layer or parameter that is not there
    │   └── ReferenceError          a gradient reference from another store, or to rows that are gone
    ├── RecordingError          the model, the data or the call to the recorder must change
    │   ├── UnsupportedParameterError   a parameter whose gradient can't be had exactly
    │   ├── SampleIdError               ids missing, duplicated, of the wrong number or type
    │   ├── ModelStateError             training mode, moved weights, another model
    │   ├── BatchError                  a batch or its losses have the wrong form
    │   └── NotFiniteError              NaN or infinity in losses or gradients
    ├── StoreError              the folder on disk
    │   ├── NotAStoreError              nothing there, or something else
    │   ├── StoreVersionError           written by another format version
    │   ├── CorruptStoreError           a file is missing, cut off or changed
    │   ├── StoreLockedError            somebody else is writing
    │   ├── CommitConflictError         somebody else committed in between
    │   └── WriteError                  the disk is full or refuses
    └── InternalError           a bug of ours: please report it
"""


class MetaQLError(Exception):
    """Base of every error raised by MetaQL on purpose."""


class QueryError(MetaQLError):
    """The SQL can't be answered as written."""


class UnknownNameError(QueryError):
    """A relation, column, layer or parameter that the store does not have."""


class ReferenceError(QueryError):
    """A gradient reference that belongs to no open store, or whose rows are gone."""


class RecordingError(MetaQLError):
    """The recorder can't go on; the model, the data or the call must change."""


class UnsupportedParameterError(RecordingError):
    """A trainable parameter whose per-sample gradient can't be had exactly."""


class SampleIdError(RecordingError):
    """Sample ids that are missing, duplicated, of the wrong number or the wrong type."""


class ModelStateError(RecordingError):
    """The model is in a state in which a sample's own gradient is not defined or not repeatable."""


class BatchError(RecordingError):
    """A batch, its losses or its metadata have a form the recorder can't use."""


class NotFiniteError(RecordingError):
    """NaN or infinity in a loss or a gradient."""


class StoreError(MetaQLError):
    """Something is wrong with the store's folder."""


class NotAStoreError(StoreError):
    """There is no MetaQL store at this path."""


class StoreVersionError(StoreError):
    """The store was written in a format this version can't read."""


class CorruptStoreError(StoreError):
    """A file of the store is missing, cut off or changed."""


class StoreLockedError(StoreError):
    """Another process is writing to the store."""


class CommitConflictError(StoreError):
    """The store moved on between reading its manifest and committing."""


class WriteError(StoreError):
    """The operating system refused a write, for instance because the disk is full."""


class InternalError(MetaQLError):
    """A broken invariant of MetaQL itself; please report it."""
