"""multicard's own backends of ``torch.distributed``; each is imported only when it is used."""
