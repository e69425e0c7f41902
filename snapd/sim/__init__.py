"""The cluster in virtual time: the real decisions, a simulated world, faults, and the promises that are checked."""
