"""The same chunks on a Dask or Ray cluster: what is written, and what is promised of rows, is that of one machine.

    this process            driver.py                   the engine's worker         node.py
    pool.py: ClusterPool -> a process that speaks to -> task.py: do_chunk,       -> a process with a Pool of one:
    chunks, ledger          the scheduler               which only waits            the same worker.py as everywhere

Each arrow is a pipe or the engine's own wire, and carries bytes that only its ends read (messages.py). So neither
this process nor the one that generates has an engine in it, and no end of one of them takes another with it.
A node writes its part into the attempt's directory on the shared file system and sends back a receipt. A small file
there, the lease (lease.py), says that the run lives; a node process that no longer sees it ends.
"""
