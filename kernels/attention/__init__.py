"""Dense attention. The public call is `api.attend`."""
