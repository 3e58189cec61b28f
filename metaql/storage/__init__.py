"""The store on disk: what it holds, how it is written, how it is read.

A store is a folder of immutable files and one pointer, ``HEAD``, to the newest manifest that names them
(docs/storage-format.md). Writing goes down this list, reading goes up:

- ``recording``: what stands beside a training loop and fills a store; ``replay``: samples that were never recorded
- ``writer``: holds the writer's lock, adds checkpoints, opens collections
- ``collection_writer``: one pass of recording; ``staging`` holds blocks until a ``background`` thread writes them
- ``layer_writer``, ``packing``, ``forms``: a layer's blocks become record batches, and these a segment;
  ``row_writer`` and ``input_writer`` do the same for ids and outputs, and for inputs
- ``arrow_writer``, ``sequential_file``: an Arrow file with a CRC for each part of it, written past the page cache
- ``manifest``, ``manifest_json``, ``commit``: what there is, how that is spelled, how it changes
- ``mapped_file``, ``segments``, ``gather``: files mapped and checked, rows found in them
- ``store``: one version, open for reading; ``tables``: the relations that SQL sees
- ``recovery``, ``maintenance``, ``check``, ``info``: what a crash left, vacuum, damage, a summary
- ``schema``, ``blocks``, ``layout``: layers, their gradients in memory, and which form of them is smaller; ``cache``
"""
