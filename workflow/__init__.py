"""Parameters, presets and the glue between Snakemake and DVC."""
