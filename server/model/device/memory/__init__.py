"""Memory of the experts: device slots and page-locked host memory."""
