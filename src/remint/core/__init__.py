"""What every stage imports: errors, configuration, paths. Nothing here imports torch."""
