"""Parameters, FLOPs and time of layers and networks, counted on the network itself."""
