"""The only folder that uses torch.distributed or reads the launcher's environment."""
