"""HTTP and websockets: signed requests, pages of the API, the agents' socket, /metrics."""
