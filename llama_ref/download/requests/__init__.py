"""Requests to Meta's server: to which hosts, with which answers, how often."""
