"""Parts that blocks are made of: attention, MLP, norm, rotary positions."""
