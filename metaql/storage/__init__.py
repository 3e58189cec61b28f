"""The store on disk: what it holds, how it is written, how it is read.

A store is a folder of immutable files and one pointer, ``HEAD``, to the newest manifest that names them
(docs/storage-format.md). Writing goes down this list, reading goes up:

- ``writer``: holds the writer's lock, adds checkpoints, opens collections
- ``collection_writer``: one pass of recording; buffers blocks and writes them on a ``background`` thread
- ``layer_writer``, ``packing``, ``forms``: a layer's blocks become record batches, and these a segment;
  ``row_writer`` and ``input_writer`` do the same for ids and outputs, and for inputs
- ``arrow_writer``: an Arrow file with a CRC for each part of it
- ``manifest``, ``manifest_json``, ``commit``: what there is, how that is spelled, how it changes
- ``mapped_file``, ``segments``, ``gather``: files mapped and checked, rows found in them
- ``store``: one version, open for reading; ``tables``: the relations that SQL sees
- ``recovery``, ``maintenance``, ``check``, ``info``: what a crash left, vacuum, damage, a summary
- ``schema``, ``blocks``: layers, and their gradients in memory
"""
