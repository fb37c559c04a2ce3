"""What a run needs and what it uses: bytes counted before it starts and measured while it runs."""
