"""The running node: jobs, sessions, captures and restores over the core's decisions."""
