// Command echo answers each datagram on port 9999 with itself.
package main

import "net"

func main() {
	c, err := net.ListenPacket("udp", ":9999")
	if err != nil {
		panic(err)
	}
	buf := make([]byte, 65536)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			panic(err)
		}
		c.WriteTo(buf[:n], from)
	}
}
