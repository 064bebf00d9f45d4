"""The one loop, its losses, optimizer, schedules and hooks."""
