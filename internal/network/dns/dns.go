// Package dns answers name questions of one container: names of other
// containers from a Zone, everything else from the servers it is told of.
// Questions and answers of others pass through untouched but for their ids, so
// that EDNS and DNSSEC work as the client and the server mean them. The package
// opens no sockets itself; package network imports it and gives them.
package dns

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// Zone knows the names and addresses of containers.
type Zone interface {
	// Lookup finds a lower-case name without its final dot. known means that
	// the name exists, even if it has no address of the kind wanted.
	Lookup(name string, six bool) (addrs []netip.Addr, known bool)
	// Reverse finds the name of an address. inside means that the address
	// belongs to the zone, even if nobody has it.
	Reverse(a netip.Addr) (name string, inside bool)
}

// Upstream is a server that questions are passed on to.
type Upstream struct {
	Addr netip.AddrPort
	// Host: asked from the host's network and not from the container's.
	Host bool
}

// Config makes a Server.
type Config struct {
	Zone Zone
	// Upstreams are asked in order; none means that nothing is passed on.
	Upstreams func() []Upstream
	// Dial connects to an upstream over "udp" or "tcp".
	Dial   func(ctx context.Context, network string, u Upstream) (net.Conn, error)
	Logger *slog.Logger
}

const (
	ttl         = 10 // seconds; containers come and go
	maxQuery    = 64 // questions of one container under way
	maxConn     = 32 // its open tcp connections
	tryTimeout  = 2500 * time.Millisecond
	allTimeout  = 9 * time.Second
	idleTimeout = 10 * time.Second
)

// Server answers one container.
type Server struct {
	cfg    Config
	ctx    context.Context
	cancel context.CancelFunc
	slots  chan struct{}
	conns  chan struct{}
	pc     net.PacketConn
	ln     net.Listener
	wg     sync.WaitGroup
}

// Serve answers on the two sockets until Close; it owns them.
func Serve(cfg Config, pc net.PacketConn, ln net.Listener) *Server {
	s := &Server{cfg: cfg, pc: pc, ln: ln, slots: make(chan struct{}, maxQuery), conns: make(chan struct{}, maxConn)}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.wg.Add(2)
	go s.packets()
	go s.streams()
	return s
}

// Close stops answering and waits for what is under way.
func (s *Server) Close() {
	s.cancel()
	s.pc.Close()
	s.ln.Close()
	s.wg.Wait()
}

func (s *Server) packets() {
	defer s.wg.Done()
	buf := make([]byte, 4096)
	for {
		n, from, err := s.pc.ReadFrom(buf)
		if err != nil {
			if errors.Is(err, net.ErrClosed) || s.ctx.Err() != nil {
				return
			}
			select { // an ICMP error of a client that went, or no memory
			case <-s.ctx.Done():
				return
			case <-time.After(5 * time.Millisecond):
			}
			continue
		}
		select {
		case s.slots <- struct{}{}:
		default:
			continue // the client asks again
		}
		q := append([]byte(nil), buf[:n]...)
		s.wg.Add(1)
		go func() {
			defer func() { <-s.slots; s.wg.Done() }()
			if a := s.answer(q, "udp"); a != nil {
				_, _ = s.pc.WriteTo(a, from)
			}
		}()
	}
}

func (s *Server) streams() {
	defer s.wg.Done()
	for {
		c, err := s.ln.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) || s.ctx.Err() != nil {
				return
			}
			select { // out of descriptors
			case <-s.ctx.Done():
				return
			case <-time.After(50 * time.Millisecond):
			}
			continue
		}
		select {
		case s.conns <- struct{}{}:
		default:
			c.Close()
			continue
		}
		s.wg.Add(1)
		go func() {
			defer func() { <-s.conns; s.wg.Done() }()
			s.stream(c)
		}()
	}
}

func (s *Server) stream(c net.Conn) {
	stop := context.AfterFunc(s.ctx, func() { c.Close() })
	defer func() { stop(); c.Close() }()
	for {
		_ = c.SetDeadline(time.Now().Add(idleTimeout))
		q, err := readFrame(c)
		if err != nil {
			return
		}
		_ = c.SetDeadline(time.Now().Add(allTimeout + idleTimeout))
		a := s.answer(q, "tcp")
		if a == nil || writeFrame(c, a) != nil {
			return
		}
	}
}

func readFrame(r io.Reader) ([]byte, error) {
	var l [2]byte
	if _, err := io.ReadFull(r, l[:]); err != nil {
		return nil, err
	}
	b := make([]byte, binary.BigEndian.Uint16(l[:]))
	_, err := io.ReadFull(r, b)
	return b, err
}

func writeFrame(w io.Writer, b []byte) error {
	if len(b) > 0xffff {
		return errors.New("dns message is too long")
	}
	_, err := w.Write(append(binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(b)), uint16(len(b))), b...))
	return err
}

// answer makes the reply to a question, nil to stay silent.
func (s *Server) answer(raw []byte, network string) []byte {
	const header = 12
	if len(raw) < header || raw[2]&0x80 != 0 {
		return nil // too short to answer, or itself an answer
	}
	q := new(dns.Msg)
	if err := q.Unpack(raw); err != nil || len(q.Question) != 1 {
		return failure(raw, dns.RcodeFormatError)
	}
	if q.Opcode != dns.OpcodeQuery {
		return failure(raw, dns.RcodeNotImplemented)
	}
	if m := s.local(q); m != nil {
		size := dns.MinMsgSize
		if o := q.IsEdns0(); o != nil {
			size = max(size, int(o.UDPSize()))
			m.SetEdns0(1232, false)
		}
		if network == "tcp" {
			size = dns.MaxMsgSize
		}
		m.Truncate(size)
		b, err := m.Pack()
		if err != nil {
			return failure(raw, dns.RcodeServerFailure)
		}
		return b
	}
	return s.forward(raw, q.Question[0], network)
}

// failure answers with an error code and the question as far as it is there.
func failure(raw []byte, code int) []byte {
	m := new(dns.Msg)
	m.Id = binary.BigEndian.Uint16(raw)
	m.Response = true
	m.RecursionDesired = raw[2]&1 != 0
	m.RecursionAvailable = true
	m.Opcode = int(raw[2]>>3) & 0xf
	m.Rcode = code
	q := new(dns.Msg)
	if q.Unpack(raw) == nil {
		m.Question = q.Question
	}
	b, err := m.Pack()
	if err != nil {
		return nil
	}
	return b
}

// local answers what the zone knows, nil if it does not.
func (s *Server) local(q *dns.Msg) *dns.Msg {
	question := q.Question[0]
	if question.Qclass != dns.ClassINET {
		return nil
	}
	name := strings.ToLower(strings.TrimSuffix(question.Name, "."))
	reply := func() *dns.Msg {
		m := new(dns.Msg)
		m.SetReply(q)
		m.RecursionAvailable = true
		return m
	}
	head := func(t uint16) dns.RR_Header {
		return dns.RR_Header{Name: question.Name, Rrtype: t, Class: dns.ClassINET, Ttl: ttl}
	}
	if a, ok := reverseAddr(name); ok {
		host, inside := s.cfg.Zone.Reverse(a)
		if !inside {
			return nil
		}
		m := reply()
		switch {
		case host == "":
			m.Rcode = dns.RcodeNameError
		case question.Qtype == dns.TypePTR || question.Qtype == dns.TypeANY:
			m.Answer = append(m.Answer, &dns.PTR{Hdr: head(dns.TypePTR), Ptr: dns.Fqdn(host)})
		}
		return m
	}
	four, known := s.cfg.Zone.Lookup(name, false)
	if !known {
		return nil
	}
	m := reply()
	if question.Qtype == dns.TypeA || question.Qtype == dns.TypeANY {
		for _, a := range four {
			m.Answer = append(m.Answer, &dns.A{Hdr: head(dns.TypeA), A: a.AsSlice()})
		}
	}
	if question.Qtype == dns.TypeAAAA || question.Qtype == dns.TypeANY {
		six, _ := s.cfg.Zone.Lookup(name, true)
		for _, a := range six {
			m.Answer = append(m.Answer, &dns.AAAA{Hdr: head(dns.TypeAAAA), AAAA: a.AsSlice()})
		}
	}
	return m
}

// reverseAddr reads a name under in-addr.arpa or ip6.arpa.
func reverseAddr(name string) (netip.Addr, bool) {
	if s, ok := strings.CutSuffix(name, ".in-addr.arpa"); ok {
		p := strings.Split(s, ".")
		if len(p) != 4 {
			return netip.Addr{}, false
		}
		a, err := netip.ParseAddr(p[3] + "." + p[2] + "." + p[1] + "." + p[0])
		return a, err == nil && a.Is4()
	}
	s, ok := strings.CutSuffix(name, ".ip6.arpa")
	if !ok || len(s) != 63 {
		return netip.Addr{}, false
	}
	var b [16]byte
	for i := range 32 {
		c := s[i*2]
		if i < 31 && s[i*2+1] != '.' {
			return netip.Addr{}, false
		}
		var v byte
		switch {
		case c >= '0' && c <= '9':
			v = c - '0'
		case c >= 'a' && c <= 'f':
			v = c - 'a' + 10
		default:
			return netip.Addr{}, false
		}
		at := 31 - i
		if at%2 == 0 {
			v <<= 4
		}
		b[at/2] |= v
	}
	return netip.AddrFrom16(b), true
}

// forward asks the upstreams in turn; the first useful answer wins.
func (s *Server) forward(raw []byte, want dns.Question, network string) []byte {
	ctx, cancel := context.WithTimeout(s.ctx, allTimeout)
	defer cancel()
	var last []byte
	for _, u := range s.cfg.Upstreams() {
		a, err := s.ask(ctx, raw, want, network, u)
		if err != nil {
			if s.cfg.Logger != nil {
				s.cfg.Logger.Debug("a name server did not answer", "server", u.Addr, "cause", err)
			}
			if ctx.Err() != nil {
				break
			}
			continue
		}
		last = a
		switch a[3] & 0xf {
		case dns.RcodeServerFailure, dns.RcodeRefused, dns.RcodeNotImplemented:
			continue
		}
		break
	}
	if last == nil {
		if s.ctx.Err() != nil {
			return nil
		}
		return failure(raw, dns.RcodeServerFailure)
	}
	return last
}

// ask puts one question to one server, under an id of our own.
func (s *Server) ask(ctx context.Context, raw []byte, want dns.Question, network string, u Upstream) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	c, err := s.cfg.Dial(ctx, network, u)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	q := append([]byte(nil), raw...)
	var id [2]byte
	rand.Read(id[:])
	q[0], q[1] = id[0], id[1]
	if network == "tcp" {
		if err := writeFrame(c, q); err != nil {
			return nil, err
		}
	} else if _, err := c.Write(q); err != nil {
		return nil, err
	}
	buf := make([]byte, 4096)
	for {
		var a []byte
		if network == "tcp" {
			a, err = readFrame(c)
		} else {
			var n int
			n, err = c.Read(buf)
			a = buf[:n]
		}
		if err != nil {
			return nil, err
		}
		if matches(a, id, want) {
			a[0], a[1] = raw[0], raw[1]
			return a, nil
		}
		if network == "tcp" {
			return nil, errors.New("the answer is to another question")
		}
	}
}

// matches tells whether a is an answer to what was asked (RFC 5452): its id
// and question are ours. Only the question is parsed.
func matches(a []byte, id [2]byte, want dns.Question) bool {
	if len(a) < 12 || a[0] != id[0] || a[1] != id[1] || a[2]&0x80 == 0 {
		return false
	}
	n := binary.BigEndian.Uint16(a[4:])
	if n == 0 {
		// Some servers leave the question out of a refusal.
		return a[3]&0xf != dns.RcodeSuccess
	}
	if n != 1 {
		return false
	}
	name, off, err := dns.UnpackDomainName(a, 12)
	if err != nil || off+4 > len(a) {
		return false
	}
	return strings.EqualFold(name, want.Name) && binary.BigEndian.Uint16(a[off:]) == want.Qtype &&
		binary.BigEndian.Uint16(a[off+2:]) == want.Qclass
}
