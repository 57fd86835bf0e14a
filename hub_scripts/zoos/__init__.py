"""Model zoos: tasks, architectures, populations, rows, windows and views."""
