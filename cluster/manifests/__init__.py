"""Deployments written out: one typed description of a cluster, one module for each kind of file made of it."""
