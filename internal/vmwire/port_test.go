package vmwire

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

// pair is a port with noise of an earlier conversation in both directions.
func pair(t *testing.T, toGuest, toHost string) (*Session, *Session) {
	t.Helper()
	l, err := net.Listen("unix", t.TempDir()+"/p")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	h, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	g, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close(); g.Close() })
	io.WriteString(h, toGuest)
	io.WriteString(g, toHost)
	guest := make(chan *Session, 1)
	go func() {
		s, err := Guest(g)
		if err != nil {
			t.Error(err)
		}
		guest <- s
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	host, err := Host(ctx, h)
	if err != nil {
		t.Fatal(err)
	}
	s := <-guest
	if s == nil {
		t.FailNow()
	}
	return host, s
}

func TestConversation(t *testing.T) {
	noise := strings.Repeat("\x00\x01\x02noise", 5000)
	for name, c := range map[string][2]string{
		"clean":               {"", ""},
		"noise":               {noise, noise},
		"an earlier greeting": {"\n" + hello + strings.Repeat("0", nonceLen) + "\n", "\n" + ready + strings.Repeat("1", nonceLen) + "\n"},
		"half a greeting":     {"\n" + hello + "12", "\n" + ready},
	} {
		t.Run(name, func(t *testing.T) {
			host, guest := pair(t, c[0], c[1])
			go func() {
				for {
					in, err := guest.Accept()
					if err != nil {
						return
					}
					go func() {
						p, err := in.Purpose(5 * time.Second)
						if err == nil && p.Kind == TCP {
							err = errors.New("connection refused\nto " + p.Address)
						}
						in.Answer(err)
						if err != nil {
							in.Close()
							return
						}
						b, _ := io.ReadAll(in) // until CloseWrite
						in.Write(bytes.ToUpper(b))
						in.Close()
					}()
				}
			}()
			s, err := host.Open(t.Context(), Purpose{Kind: API})
			if err != nil {
				t.Fatal(err)
			}
			go func() { s.Write(bytes.Repeat([]byte("hello"), 1<<20)); s.CloseWrite() }()
			b, err := io.ReadAll(s)
			if err != nil || len(b) != 5<<20 || string(b[:5]) != "HELLO" {
				t.Fatalf("%d bytes, %v", len(b), err)
			}
			s.Close()
			if _, err := host.Open(t.Context(), Purpose{Kind: TCP, Address: "10.0.0.1:80"}); err == nil || err.Error() != "connection refused to 10.0.0.1:80" {
				t.Fatalf("a refused stream: %v", err)
			}
		})
	}
}

// TestHostComesAgain greets a guest that is in the middle of a frame of a host
// that is gone, as the port has it: no end of file between.
func TestHostComesAgain(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("unix", dir+"/host")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port, machine := net.Pipe()
	defer port.Close()
	var host net.Conn
	var mu sync.Mutex
	go func() { // the machine: what hosts say reaches the port, without an end
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			host = c
			mu.Unlock()
			go io.Copy(machine, c)
		}
	}()
	go func() {
		b := make([]byte, 4096)
		for {
			n, err := machine.Read(b)
			if err != nil {
				return
			}
			mu.Lock()
			c := host
			mu.Unlock()
			c.Write(b[:n])
		}
	}()
	go func() {
		for {
			s, err := Guest(keep{port})
			if err != nil {
				return
			}
			go func() {
				for {
					in, err := s.Accept()
					if err != nil {
						return
					}
					in.Purpose(time.Second)
					in.Answer(nil)
				}
			}()
			<-s.Done()
		}
	}()
	for range 3 {
		conn, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		host, err := Host(ctx, conn)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := host.Open(ctx, Purpose{Kind: API}); err != nil {
			t.Fatal(err)
		}
		cancel()
		// The host is gone within a frame.
		conn.Write([]byte{0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0xff, 0xff, 'x'})
		conn.Close()
	}
}

type keep struct{ net.Conn }

func (keep) Close() error { return nil }

func TestHostGivesUp(t *testing.T) {
	h, g := net.Pipe()
	defer g.Close()
	go io.Copy(io.Discard, g)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Host(ctx, h); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
}

func TestDatagrams(t *testing.T) {
	var wire bytes.Buffer
	buf := make([]byte, MaxDatagram+2)
	for _, n := range []int{0, 1, MaxDatagram} {
		if err := WriteDatagram(&wire, buf, n); err != nil {
			t.Fatal(err)
		}
		if got, err := ReadDatagram(&wire, buf[:MaxDatagram]); err != nil || got != n {
			t.Fatal(got, err)
		}
	}
	if err := WriteDatagram(&wire, buf, MaxDatagram+1); err == nil {
		t.Fatal("too long a datagram was written")
	}
	if _, err := ReadDatagram(strings.NewReader("\x00\x05abc"), buf); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatal(err)
	}
}

func FuzzParsePurpose(f *testing.F) {
	for _, s := range []string{"api", "ctl", "tcp 127.0.0.1:80", "udp [::1]:53", "tcp :80", "tcp a:0", "tcp a:65536", "api x", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, line string) {
		p, err := ParsePurpose(line)
		if err != nil {
			return
		}
		if again, err := ParsePurpose(p.String()); err != nil || again != p {
			t.Fatalf("%q: %+v, %+v, %v", line, p, again, err)
		}
	})
}
