"""The same chunks on a Dask or Ray cluster: what is written, and what is promised of rows, is as on one machine.

    this process            driver.py               the engine's worker         node.py
    pool.py: ClusterPool -> a process with the   -> task.py: do_chunk,       -> a process with a Pool of one
    chunks, ledger          engine's client         which only waits            worker, as on one machine

connection.py starts the driver. Each arrow is a pipe or the engine's own wire, and carries bytes that only its ends
read (messages.py). So neither this process nor the one that generates has an engine in it, and if one of them dies it
takes no other with it. A node writes its part into the attempt's directory on the shared file system and sends back a
receipt. A small file there, the lease (lease.py), shows that the run lives; a node process ends without it.
"""
