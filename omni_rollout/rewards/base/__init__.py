"""What every reward shares: the contract, finding one, calling it within limits, their sum, and HTTP on both ends."""
