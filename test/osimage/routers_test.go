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

	"github.com/cloudos-io/cloudos/internal/vmwire"
	"github.com/cloudos-io/cloudos/test/harness"
)

// router is a link's other end: it announces what it is told to, once a second and when it is asked.
type router struct {
	conn *net.UDPConn
	to   *net.UDPAddr

	mu     sync.Mutex
	frames [][]byte
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
		if _, err := r.conn.Read(b); err != nil {
			if e, ok := err.(net.Error); !ok || !e.Timeout() {
				return
			}
		}
		r.mu.Lock()
		frames := r.frames
		r.mu.Unlock()
		for _, f := range frames {
			r.conn.WriteToUDP(f, r.to)
		}
	}
}

// advertisement is a router advertisement with options, as a frame of Ethernet (RFC 4861 section 4.2).
func advertisement(hops byte, lifetime uint16, options ...[]byte) []byte {
	from, all := netip.MustParseAddr("fe80::1").As16(), netip.MustParseAddr("ff02::1").As16()
	body := binary.BigEndian.AppendUint16([]byte{134, 0, 0, 0, 64, 0}, lifetime)
	body = append(body, make([]byte, 8)...)
	for _, o := range options {
		body = append(body, o...)
	}
	pseudo := append(append(slices.Clone(from[:]), all[:]...), 0, 0, byte(len(body)>>8), byte(len(body)), 0, 0, 0, 58)
	var sum uint32
	for b := append(pseudo, body...); len(b) > 1; b = b[2:] {
		sum += uint32(b[0])<<8 | uint32(b[1])
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(body[2:], ^uint16(sum))
	frame := []byte{0x33, 0x33, 0, 0, 0, 1, 2, 0, 0, 0, 0, 1, 0x86, 0xdd, 0x60, 0, 0, 0, byte(len(body) >> 8), byte(len(body)), 58, hops}
	return append(append(append(frame, from[:]...), all[:]...), body...)
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
	r.announce(advertisement(255, 1800, prefix, servers(0xffffffff, "2001:db8:7::53", "fe80::53"), domain),
		advertisement(64, 1800, servers(3600, "2001:db8:bad::53")))
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
	r.announce(advertisement(255, 0, prefix, servers(0, "2001:db8:7::53")))
	harness.Eventually(t, "the server is withdrawn", time.Minute, known("fe80::53%eth1"))
	// One that says so for ten seconds, and then nothing more.
	r.announce(advertisement(255, 0, servers(10, "2001:db8:7::54")))
	harness.Eventually(t, "another server", time.Minute, known("2001:db8:7::54", "fe80::53%eth1"))
	r.announce()
	harness.Eventually(t, "its end", time.Minute, known("fe80::53%eth1"))
	m.off()
}
