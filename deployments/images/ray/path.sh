PATH=/opt/fastserve/bin:$PATH
