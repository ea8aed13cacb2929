"""Where the experts lie: device slots and page-locked host memory."""
