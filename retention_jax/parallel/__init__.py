"""Many devices and many processes: layout on a mesh, joining, checksums that all of them share."""
