"""The lab: the service's own scheduler, policies and load table against modelled engines, in virtual time.

Deterministic: the same settings and seed give the same figures. Nothing here is used by the service.
"""
