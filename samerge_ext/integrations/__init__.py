"""Classes of other libraries, made of ours: imported only when asked for, and without those libraries."""
