"""Which channels go, and when: targets, limits, order, scope, search, schedule."""
