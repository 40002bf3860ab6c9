"""How teachers and correctors are judged: modes, rollouts, metrics and the report."""
