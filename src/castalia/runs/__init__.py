"""What a run is before and after its training: its config, its folder, its rows."""
