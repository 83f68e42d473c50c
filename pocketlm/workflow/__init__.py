"""The bridge between Snakemake and DVC, sweeps and the launcher."""
