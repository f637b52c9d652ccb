package network

import (
	"context"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	mdns "github.com/miekg/dns"
	mnetwork "github.com/moby/moby/api/types/network"
)

// lookup resolves by the container's name server with Go's own resolver.
func lookup(ns *os.File, name, network string) ([]string, error) {
	r := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, proto, _ string) (net.Conn, error) {
		var c net.Conn
		err := insideErr(ns, func() (err error) {
			c, err = net.Dial(proto, "127.0.0.11:53")
			return err
		})
		return c, err
	}}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	as, err := r.LookupNetIP(ctx, network, name+".")
	var out []string
	for _, a := range as {
		out = append(out, a.Unmap().String())
	}
	slices.Sort(out)
	return out, err
}

func query(t *testing.T, ns *os.File, proto, name string, typ uint16) *mdns.Msg {
	t.Helper()
	var c net.Conn
	in(t, ns, func() (err error) {
		c, err = net.Dial(proto, "127.0.0.11:53")
		return err
	})
	defer c.Close()
	q := new(mdns.Msg)
	q.SetQuestion(mdns.Fqdn(name), typ)
	q.SetEdns0(1400, true)
	cl := mdns.Client{Net: proto, Timeout: 5 * time.Second}
	a, _, err := cl.ExchangeWithConn(q, &mdns.Conn{Conn: c})
	if err != nil {
		t.Fatalf("%s %s: %v", proto, name, err)
	}
	return a
}

func TestNames(t *testing.T) {
	m := newManager(t, func(c *Config) { c.IPv6 = "off" })
	ctx := context.Background()
	create(t, m, mnetwork.CreateRequest{Name: "n"})
	create(t, m, mnetwork.CreateRequest{Name: "other"})
	a, b, c, o := newNS(t), newNS(t), newNS(t), newNS(t)
	alias := func(s ...string) func(*AttachRequest) {
		return func(r *AttachRequest) { r.Settings = &mnetwork.EndpointSettings{Aliases: s} }
	}
	aa := attach(t, m, a, "0123456789abcdef0123", "n", func(r *AttachRequest) {
		r.ContainerName, r.Settings = "Web-1", &mnetwork.EndpointSettings{Aliases: []string{"web"}}
	})
	ba := attach(t, m, b, "b", "n", alias("web"))
	attach(t, m, c, "c", "n", func(r *AttachRequest) { r.Settings = &mnetwork.EndpointSettings{Links: []string{"b:db"}} })
	attach(t, m, o, "o", "other", nil)
	ip := aa.Settings.IPAddress.String()
	both := []string{ip, ba.Settings.IPAddress.String()}
	for name, want := range map[string][]string{"web-1": {ip}, "WEB-1": {ip}, "0123456789ab": {ip}, "web-1.n": {ip}, "web": both, "db": {both[1]}} {
		got, err := lookup(c, name, "ip4")
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: got %v, %v; want %v", name, got, err, want)
		}
	}
	if _, err := lookup(o, "web", "ip4"); err == nil {
		t.Error("a name is known on another network")
	}
	if _, err := lookup(a, "db", "ip4"); err == nil {
		t.Error("a link of one container is known to another")
	}
	for _, proto := range []string{"udp", "tcp"} {
		if r := query(t, c, proto, "web-1", mdns.TypeAAAA); r.Rcode != mdns.RcodeSuccess || len(r.Answer) != 0 {
			t.Errorf("AAAA of a name without: %v", r)
		}
		if r := query(t, c, proto, "web-1", mdns.TypeMX); r.Rcode != mdns.RcodeSuccess || len(r.Answer) != 0 {
			t.Errorf("MX of a name without: %v", r)
		}
		rev, _ := mdns.ReverseAddr(ip)
		if r := query(t, c, proto, rev, mdns.TypePTR); len(r.Answer) != 1 || r.Answer[0].(*mdns.PTR).Ptr != "Web-1.n." {
			t.Errorf("PTR: %v", r)
		}
	}
	m.SetHealthy("b", false)
	if got, _ := lookup(c, "web", "ip4"); !slices.Equal(got, []string{ip}) {
		t.Errorf("the unhealthy is offered: %v", got)
	}
	if got, _ := lookup(c, "b", "ip4"); !slices.Equal(got, both[1:]) {
		t.Errorf("a name of an unhealthy container alone: %v", got)
	}
	m.SetHealthy("b", true)
	if err := m.Rename(ctx, "b", "bee"); err != nil {
		t.Fatal(err)
	}
	if got, err := lookup(c, "bee", "ip4"); err != nil || !slices.Equal(got, both[1:]) {
		t.Errorf("renamed: %v, %v", got, err)
	}
	if _, err := lookup(c, "b.n", "ip4"); err != nil {
		t.Errorf("the short id is a name: %v", err)
	}
	// The container's own port 53 is free.
	in(t, c, func() error {
		pc, err := net.ListenPacket("udp", ":53")
		if err == nil {
			pc.Close()
		}
		return err
	})
	if err := m.Release(ctx, "b"); err != nil {
		t.Fatal(err)
	}
	if got, _ := lookup(c, "web", "ip4"); !slices.Equal(got, []string{ip}) {
		t.Errorf("the gone is offered: %v", got)
	}
}

func TestUpstream(t *testing.T) {
	wire := outside(t)
	m := newManager(t, nil)
	create(t, m, mnetwork.CreateRequest{Name: "n"})
	create(t, m, mnetwork.CreateRequest{Name: "in", Internal: true})
	h := mdns.HandlerFunc(func(w mdns.ResponseWriter, q *mdns.Msg) {
		r := new(mdns.Msg)
		r.SetReply(q)
		switch q.Question[0].Name {
		case "example.org.":
			r.Answer = append(r.Answer, &mdns.A{Hdr: mdns.RR_Header{Name: q.Question[0].Name, Rrtype: mdns.TypeA, Class: 1, Ttl: 7}, A: net.IPv4(192, 0, 2, 7)})
		case "big.org.":
			if w.LocalAddr().Network() == "udp" {
				r.Truncated = true
				break
			}
			for i := range 200 {
				r.Answer = append(r.Answer, &mdns.A{Hdr: mdns.RR_Header{Name: q.Question[0].Name, Rrtype: mdns.TypeA, Class: 1, Ttl: 7}, A: net.IPv4(192, 0, 2, byte(i))})
			}
		default:
			r.Rcode = mdns.RcodeNameError
		}
		w.WriteMsg(r)
	})
	var pc net.PacketConn
	var ln net.Listener
	in(t, wire, func() (err error) {
		if pc, err = net.ListenPacket("udp", client4+":53"); err == nil {
			ln, err = net.Listen("tcp", client4+":53")
		}
		return err
	})
	for _, s := range []*mdns.Server{{PacketConn: pc, Handler: h}, {Listener: ln, Handler: h}} {
		go s.ActivateAndServe()
		defer s.Shutdown()
	}
	c, i := newNS(t), newNS(t)
	dns := func(r *AttachRequest) { r.DNS = []netip.Addr{netip.MustParseAddr(client4)} }
	attach(t, m, c, "c", "n", dns)
	attach(t, m, i, "i", "in", dns)
	for _, proto := range []string{"udp", "tcp"} {
		if r := query(t, c, proto, "example.org", mdns.TypeA); len(r.Answer) != 1 || r.Answer[0].Header().Ttl != 7 {
			t.Errorf("%s: %v", proto, r)
		}
		if r := query(t, c, proto, "nosuch.org", mdns.TypeA); r.Rcode != mdns.RcodeNameError {
			t.Errorf("%s: %v", proto, r)
		}
	}
	if r := query(t, c, "udp", "big.org", mdns.TypeA); !r.Truncated {
		t.Errorf("got %v", r)
	}
	if r := query(t, c, "tcp", "big.org", mdns.TypeA); len(r.Answer) != 200 {
		t.Errorf("got %d answers", len(r.Answer))
	}
	if r := query(t, i, "udp", "example.org", mdns.TypeA); r.Rcode != mdns.RcodeServerFailure {
		t.Errorf("an internal network's container asked the outside: %v", r)
	}
}
