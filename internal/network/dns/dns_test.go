package dns

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/miekg/dns"
)

type zone map[string][]netip.Addr

func (z zone) Lookup(name string, six bool) (out []netip.Addr, known bool) {
	as, known := z[name]
	for _, a := range as {
		if a.Is6() == six {
			out = append(out, a)
		}
	}
	return out, known
}

func (z zone) Reverse(a netip.Addr) (string, bool) {
	for n, as := range z {
		for _, o := range as {
			if o == a {
				return n, true
			}
		}
	}
	return "", netip.MustParsePrefix("10.0.0.0/8").Contains(a)
}

var testZone = zone{"web": {netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")}, "four": {netip.MustParseAddr("10.0.0.4")}}

func newServer(up ...Upstream) *Server {
	s := &Server{cfg: Config{Zone: testZone, Upstreams: func() []Upstream { return up },
		Dial: func(ctx context.Context, network string, u Upstream) (net.Conn, error) {
			if !u.Addr.IsValid() {
				return nil, errors.New("cannot dial")
			}
			return (&net.Dialer{}).DialContext(ctx, network, u.Addr.String())
		}}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

func TestLocal(t *testing.T) {
	s := newServer()
	for _, c := range []struct {
		name    string
		typ     uint16
		answers int
		rcode   int
	}{
		{"web.", dns.TypeA, 1, dns.RcodeSuccess},
		{"WEB.", dns.TypeA, 1, dns.RcodeSuccess},
		{"web.", dns.TypeAAAA, 1, dns.RcodeSuccess},
		{"web.", dns.TypeANY, 2, dns.RcodeSuccess},
		{"web.", dns.TypeTXT, 0, dns.RcodeSuccess},
		{"four.", dns.TypeAAAA, 0, dns.RcodeSuccess},
		{"nosuch.", dns.TypeA, 0, dns.RcodeServerFailure}, // no upstream
		{"1.0.0.10.in-addr.arpa.", dns.TypePTR, 1, dns.RcodeSuccess},
		{"1.0.0.10.in-addr.arpa.", dns.TypeA, 0, dns.RcodeSuccess},
		{"9.0.0.10.in-addr.arpa.", dns.TypePTR, 0, dns.RcodeNameError},
		{"9.0.0.11.in-addr.arpa.", dns.TypePTR, 0, dns.RcodeServerFailure},
		{"1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa.", dns.TypePTR, 1, dns.RcodeSuccess},
	} {
		q := new(dns.Msg)
		q.SetQuestion(c.name, c.typ)
		raw, err := q.Pack()
		if err != nil {
			t.Fatal(err)
		}
		a := new(dns.Msg)
		if err := a.Unpack(s.answer(raw, "udp")); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if a.Id != q.Id || !a.Response || a.Rcode != c.rcode || len(a.Answer) != c.answers || len(a.Question) != 1 {
			t.Errorf("%s %s: got %v", c.name, dns.TypeToString[c.typ], a)
		}
	}
}

func TestTruncation(t *testing.T) {
	s := newServer()
	var many []netip.Addr
	for i := range 100 {
		many = append(many, netip.AddrFrom4([4]byte{10, 0, 1, byte(i)}))
	}
	s.cfg.Zone = zone{"many": many}
	q := new(dns.Msg)
	q.SetQuestion("many.", dns.TypeA)
	raw, _ := q.Pack()
	a := new(dns.Msg)
	if b := s.answer(raw, "udp"); a.Unpack(b) != nil || !a.Truncated || len(b) > dns.MinMsgSize {
		t.Errorf("got %d bytes: %v", len(b), a)
	}
	if b := s.answer(raw, "tcp"); a.Unpack(b) != nil || a.Truncated || len(a.Answer) != 100 {
		t.Errorf("got %v", a)
	}
}

// A server that answers wrongly first: another id, another question, rubbish.
func TestForgedAnswers(t *testing.T) {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	go func() {
		b := make([]byte, 2000)
		for {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			q := new(dns.Msg)
			if q.Unpack(b[:n]) != nil {
				return
			}
			send := func(edit func(*dns.Msg), last byte) {
				a := new(dns.Msg)
				a.SetReply(q)
				a.Answer = append(a.Answer, &dns.A{Hdr: dns.RR_Header{Name: a.Question[0].Name, Rrtype: 1, Class: 1}, A: net.IPv4(192, 0, 2, last)})
				edit(a)
				raw, _ := a.Pack()
				pc.WriteTo(raw, from)
			}
			pc.WriteTo([]byte("rubbish"), from)
			send(func(a *dns.Msg) { a.Id++ }, 66)
			send(func(a *dns.Msg) { a.Question[0].Name = "other." }, 66)
			send(func(a *dns.Msg) { a.Response = false }, 66)
			send(func(a *dns.Msg) {}, 1)
		}
	}()
	dead := Upstream{}
	s := newServer(dead, Upstream{Addr: netip.MustParseAddrPort(pc.LocalAddr().String())})
	q := new(dns.Msg)
	q.SetQuestion("example.org.", dns.TypeA)
	raw, _ := q.Pack()
	a := new(dns.Msg)
	if err := a.Unpack(s.answer(raw, "udp")); err != nil || a.Id != q.Id || len(a.Answer) != 1 || a.Answer[0].(*dns.A).A.String() != "192.0.2.1" {
		t.Fatalf("got %v, %v", a, err)
	}
}

func TestClose(t *testing.T) {
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	silent, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	s := newServer(Upstream{Addr: netip.MustParseAddrPort(silent.LocalAddr().String())})
	s = Serve(s.cfg, pc, ln)
	c, _ := net.Dial("udp", pc.LocalAddr().String())
	defer c.Close()
	idle, _ := net.Dial("tcp", ln.Addr().String())
	defer idle.Close()
	q := new(dns.Msg)
	q.SetQuestion("example.org.", dns.TypeA)
	raw, _ := q.Pack()
	c.Write(raw)
	silent.ReadFrom(make([]byte, 1000)) // the question is under way
	done := make(chan bool)
	go func() { s.Close(); close(done) }()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		t.Fatal("Close waits for an answer that does not come")
	}
}

func FuzzAnswer(f *testing.F) {
	for _, n := range []string{"web.", "nosuch.", "1.0.0.10.in-addr.arpa."} {
		q := new(dns.Msg)
		q.SetQuestion(n, dns.TypeA)
		q.SetEdns0(1232, true)
		raw, _ := q.Pack()
		f.Add(raw)
	}
	f.Add([]byte{0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0xc0, 12, 0, 1, 0, 1})
	s := newServer()
	f.Fuzz(func(t *testing.T, raw []byte) {
		for _, n := range []string{"udp", "tcp"} {
			a := s.answer(raw, n)
			if a == nil {
				if len(raw) >= 12 && raw[2]&0x80 == 0 {
					t.Fatal("a question was left without an answer")
				}
				continue
			}
			if len(a) < 12 || a[0] != raw[0] || a[1] != raw[1] || a[2]&0x80 == 0 {
				t.Fatalf("got %x for %x", a, raw)
			}
		}
		matches(raw, [2]byte{}, dns.Question{Name: "web.", Qtype: 1, Qclass: 1})
	})
}
