package osimage

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv6"

	"github.com/cloudos-io/cloudos/internal/vmwire"
	"github.com/cloudos-io/cloudos/test/harness"
)

// router is a link's other end: it announces what it is told to, once a second and when it is asked.
type router struct {
	conn *net.UDPConn
	to   *net.UDPAddr

	mu     sync.Mutex
	frames [][]byte
	asked  int // requests for information that were answered
}

func (r *router) announce(frames ...[]byte) {
	r.mu.Lock()
	r.frames = frames
	r.mu.Unlock()
}

func (r *router) run() {
	b := make([]byte, 2048)
	for {
		r.conn.SetReadDeadline(time.Now().Add(time.Second))
		n, err := r.conn.Read(b)
		if err != nil {
			if e, ok := err.(net.Error); !ok || !e.Timeout() {
				return
			}
		}
		answer := information(b[:n])
		r.mu.Lock()
		frames := r.frames
		if answer != nil {
			r.asked++
			frames = [][]byte{answer}
		}
		r.mu.Unlock()
		for _, f := range frames {
			r.conn.WriteToUDP(f, r.to)
		}
	}
}

// advertisement is a router advertisement with options, as a frame of Ethernet (RFC 4861 section 4.2).
func advertisement(hops, flags byte, lifetime uint16, options ...[]byte) []byte {
	body := binary.BigEndian.AppendUint16([]byte{134, 0, 0, 0, 64, flags}, lifetime)
	body = append(body, make([]byte, 8)...)
	for _, o := range options {
		body = append(body, o...)
	}
	return packet([]byte{0x33, 0x33, 0, 0, 0, 1}, netip.MustParseAddr("ff02::1"), 58, hops, body, 2)
}

// packet is one of the router's, with its checksum put into the body.
func packet(mac []byte, to netip.Addr, protocol, hops byte, body []byte, sumAt int) []byte {
	from, dst := netip.MustParseAddr("fe80::1").As16(), to.As16()
	pseudo := append(append(slices.Clone(from[:]), dst[:]...), 0, 0, byte(len(body)>>8), byte(len(body)), 0, 0, 0, protocol)
	var sum uint32
	all := append(pseudo, body...)
	if len(all)%2 == 1 {
		all = append(all, 0)
	}
	for ; len(all) > 1; all = all[2:] {
		sum += uint32(all[0])<<8 | uint32(all[1])
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(body[sumAt:], ^uint16(sum))
	frame := append(slices.Clone(mac), 2, 0, 0, 0, 0, 1, 0x86, 0xdd, 0x60, 0, 0, 0, byte(len(body)>>8), byte(len(body)), protocol, hops)
	return append(append(append(frame, from[:]...), dst[:]...), body...)
}

// information answers a frame that asks a DHCPv6 server what it knows beside addresses; nil is another frame.
func information(frame []byte) []byte {
	const head = 14 + 40 + 8
	if len(frame) < head || frame[12] != 0x86 || frame[13] != 0xdd || frame[20] != 17 || binary.BigEndian.Uint16(frame[56:]) != dhcpv6.DefaultServerPort {
		return nil
	}
	ask, err := dhcpv6.MessageFromBytes(frame[head:])
	if err != nil || ask.MessageType != dhcpv6.MessageTypeInformationRequest {
		return nil
	}
	reply, err := dhcpv6.NewReplyFromMessage(ask, dhcpv6.WithServerID(&dhcpv6.DUIDLL{HWType: 1, LinkLayerAddr: net.HardwareAddr{2, 0, 0, 0, 0, 1}}),
		dhcpv6.WithDNS(net.ParseIP("2001:db8:6::53")), dhcpv6.WithDomainSearchList("six.example"))
	if err != nil {
		return nil
	}
	b := reply.ToBytes()
	body := binary.BigEndian.AppendUint16(nil, dhcpv6.DefaultServerPort)
	body = binary.BigEndian.AppendUint16(body, dhcpv6.DefaultClientPort)
	body = append(binary.BigEndian.AppendUint16(body, uint16(8+len(b))), 0, 0)
	return packet(frame[6:12], netip.AddrFrom16([16]byte(frame[22:38])), 17, 64, append(body, b...), 6)
}

// option is one of an advertisement.
func option(kind byte, lifetime uint32, value []byte) []byte {
	for len(value)%8 != 0 {
		value = append(value, 0)
	}
	return append(binary.BigEndian.AppendUint32([]byte{kind, byte(len(value)/8 + 1), 0, 0}, lifetime), value...)
}

func servers(lifetime uint32, list ...string) []byte {
	var b []byte
	for _, s := range list {
		a := netip.MustParseAddr(s).As16()
		b = append(b, a[:]...)
	}
	return option(25, lifetime, b)
}

// TestRouterNames takes name servers and search domains from router advertisements, as long as they are announced, and
// none from one that came over a router (its hop limit is not 255).
func TestRouterNames(t *testing.T) {
	long(t)
	conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	port := freePort(t)
	r := &router{conn: conn, to: &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port}}
	prefix := append(append([]byte{3, 4, 64, 0xc0}, 0, 0, 0x0e, 0x10, 0, 0, 0x0e, 0x10, 0, 0, 0, 0), net.ParseIP("2001:db8:7::")...)
	domain := option(31, 3600, []byte("\x03lan\x07example\x00"))
	r.announce(advertisement(255, 0, 1800, prefix, servers(0xffffffff, "2001:db8:7::53", "fe80::53"), domain),
		advertisement(64, 0, 1800, servers(3600, "2001:db8:bad::53")))
	go r.run()
	m := vm(t, vmImage(t), "", "", "-set", "netdev.n.ipv4=off",
		"-netdev", fmt.Sprintf("socket,id=r,udp=%s,localaddr=127.0.0.1:%d", conn.LocalAddr(), port), "-device", "virtio-net-pci,netdev=r,mac=52:54:00:00:00:02")
	if s := m.settled(); s.State != vmwire.StateReady || len(s.Problems) > 0 {
		t.Fatalf("the machine is %+v", s)
	}
	var link vmwire.Interface
	known := func(want ...string) func() bool {
		return func() bool {
			for _, link = range m.settled().Interfaces {
				if link.Name == "eth1" {
					break
				}
			}
			return slices.Equal(link.DNS, want)
		}
	}
	defer func() { t.Logf("the link is %+v", link) }()
	harness.Eventually(t, "name servers", time.Minute, known("2001:db8:7::53", "fe80::53%eth1"))
	if !slices.ContainsFunc(link.Addresses, func(a string) bool { return strings.HasPrefix(a, "2001:db8:7:") }) {
		t.Errorf("the link's addresses are %v", link.Addresses)
	}
	resolv := func() string {
		return m.must("run", "--rm", "--network", "host", "servin/hello", "cat", "/etc/resolv.conf")
	}
	if out := resolv(); !strings.Contains(out, "nameserver 2001:db8:7::53\n") || !strings.Contains(out, "search lan.example") || strings.Contains(out, "bad") {
		t.Errorf("resolv.conf is\n%s", out)
	}
	// The router is none any more, and withdraws one server.
	r.announce(advertisement(255, 0, 0, prefix, servers(0, "2001:db8:7::53")))
	harness.Eventually(t, "the server is withdrawn", time.Minute, known("fe80::53%eth1"))
	// One that says so for ten seconds, and then nothing more.
	r.announce(advertisement(255, 0, 0, servers(10, "2001:db8:7::54")))
	harness.Eventually(t, "another server", time.Minute, known("2001:db8:7::54", "fe80::53%eth1"))
	r.announce()
	harness.Eventually(t, "its end", time.Minute, known("fe80::53%eth1"))
	// A router that knows a DHCPv6 server.
	r.announce(advertisement(255, 0x40, 1800, prefix))
	harness.Eventually(t, "DHCPv6", time.Minute, known("fe80::53%eth1", "2001:db8:6::53"))
	if out := resolv(); !strings.Contains(out, "nameserver 2001:db8:6::53\n") || !strings.Contains(out, "lan.example six.example") {
		t.Errorf("resolv.conf is\n%s", out)
	}
	r.mu.Lock()
	if r.asked != 1 {
		t.Errorf("the server was asked %d times", r.asked)
	}
	r.mu.Unlock()
	m.off()
}
