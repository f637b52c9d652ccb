package network

import (
	"encoding/binary"
	"hash/crc32"
	"net"
	"testing"
	"time"
)

// sctpInit is the first packet of an association: header, INIT chunk and the
// checksum of RFC 9260 (CRC-32C, little endian).
func sctpInit(from, to uint16) []byte {
	b := make([]byte, 32)
	binary.BigEndian.PutUint16(b, from)
	binary.BigEndian.PutUint16(b[2:], to)
	b[12] = 1 // INIT, whose verification tag is 0
	binary.BigEndian.PutUint16(b[14:], 20)
	binary.BigEndian.PutUint32(b[16:], 0x12345678)
	binary.BigEndian.PutUint32(b[20:], 65536)
	binary.BigEndian.PutUint16(b[24:], 1)
	binary.BigEndian.PutUint16(b[26:], 1)
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return b
}

// What publishing SCTP needs of the kernel is translation alone: associations are
// between client and container.
func TestPublishSCTP(t *testing.T) {
	wire := outside(t)
	m := newManager(t, nil)
	ns := newNS(t)
	attach(t, m, ns, "a", "bridge", func(r *AttachRequest) { r.Ports = ports(t, "5000:6000/sctp") })
	var got, out net.PacketConn
	in(t, ns, func() (err error) { got, err = net.ListenPacket("ip4:132", "0.0.0.0"); return err })
	defer got.Close()
	in(t, wire, func() (err error) { out, err = net.ListenPacket("ip4:132", "0.0.0.0"); return err })
	defer out.Close()
	b := make([]byte, 1500)
	for end := time.Now().Add(10 * time.Second); ; {
		if _, err := out.WriteTo(sctpInit(4000, 5000), &net.IPAddr{IP: net.ParseIP(host4)}); err != nil {
			t.Fatal(err)
		}
		_ = got.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		n, from, err := got.ReadFrom(b)
		if err == nil {
			if p := binary.BigEndian.Uint16(b[2:]); n < 32 || p != 6000 || from.String() != client4 {
				t.Errorf("got %d bytes for port %d from %s", n, p, from)
			}
			break
		}
		if time.Now().After(end) {
			t.Fatalf("no packet came: %v\n%s", err, ruleset())
		}
	}
}
