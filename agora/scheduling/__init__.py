"""Who does what when: subtasks on machines, band among transfers, replicas under load."""
