"""Who does the chunks: worker processes of this machine, or a cluster's."""
