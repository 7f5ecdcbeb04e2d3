"""Files that predictions are written to: bigWig, narrowPeak, HDF5 and the report page."""
