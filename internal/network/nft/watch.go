package nft

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// Watch restores the rules within a second after somebody else removed or
// changed them, until ctx ends. restored is told of each time.
func (t *Table) Watch(ctx context.Context, restored func(error)) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER)
	if err != nil {
		return fmt.Errorf("cannot watch nftables: %w", err)
	}
	f := os.NewFile(uintptr(fd), "nftables")
	defer f.Close()
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1 << (unix.NFNLGRP_NFTABLES - 1)}); err != nil {
		return fmt.Errorf("cannot watch nftables: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buf := make([]byte, 64<<10)
	check := func() {
		if ok, err := t.intact(); err == nil && ok {
			return
		}
		if ok, err := t.restore(); ok {
			restored(err)
		}
	}
	check()
	for {
		n, err := f.Read(buf)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS): // events were lost
		case err != nil:
			return fmt.Errorf("cannot watch nftables: %w", err)
		case !t.concerned(buf[:n]):
			continue
		}
		// A flush comes as many events, and whoever flushes may be about to
		// load a ruleset of his own: let that finish first.
		f.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		for {
			if _, err := f.Read(buf); errors.Is(err, os.ErrDeadlineExceeded) {
				break
			} else if err != nil && !errors.Is(err, unix.ENOBUFS) {
				return fmt.Errorf("cannot watch nftables: %w", err)
			}
			if ctx.Err() != nil {
				return nil
			}
		}
		f.SetReadDeadline(time.Time{})
		if ctx.Err() != nil {
			return nil
		}
		check()
	}
}

// concerned tells whether a notification is of somebody else's change to one
// of our tables.
func (t *Table) concerned(b []byte) bool {
	t.mu.Lock()
	pid := t.pid
	t.mu.Unlock()
	for len(b) >= unix.SizeofNlMsghdr+4 {
		size := int(binary.NativeEndian.Uint32(b))
		if size < unix.SizeofNlMsghdr+4 || size > len(b) {
			return false
		}
		typ, from := binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint32(b[12:])
		body := b[unix.SizeofNlMsghdr+4 : size]
		// The table's name is the first attribute of all of these messages.
		if from != pid && typ>>8 == unix.NFNL_SUBSYS_NFTABLES && typ&0xff != unix.NFT_MSG_NEWGEN && len(body) >= 4 {
			l := int(binary.NativeEndian.Uint16(body))
			if l >= 4 && l <= len(body) && unix.ByteSliceToString(body[4:l]) == t.name {
				return true
			}
		}
		b = b[min(len(b), (size+3)&^3):]
	}
	return false
}

// restore writes the rules anew, unless they were deleted on purpose.
func (t *Table) restore() (bool, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.live {
		return false, nil
	}
	return true, t.sync()
}

// intact compares the kernel's rules and elements with the books by number.
func (t *Table) intact() (bool, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.live {
		return true, nil
	}
	// A connection of its own: a dump that fails half way leaves answers.
	c, err := nftables.New()
	if err != nil {
		return false, err
	}
	ports := make([]Port, 0, len(t.ports))
	for p := range t.ports {
		ports = append(ports, p)
	}
	for _, f := range t.families() {
		tab := &nftables.Table{Name: t.name, Family: f.table}
		rec := &nftables.Conn{}
		w := &counter{}
		w.count(t, rec, tab, f)
		chains, err := c.ListChainsOfTableFamily(f.table)
		if err != nil {
			return false, err
		}
		have := 0
		for _, ch := range chains {
			if ch.Table.Name != t.name {
				continue
			}
			rules, err := c.GetRules(tab, ch)
			if err != nil {
				return false, err
			}
			have += len(rules)
		}
		if have != w.rules {
			return false, nil
		}
		want := map[string]int{}
		for _, b := range t.bridges {
			for _, ch := range f.bridgeElements(b) {
				want[ch.set] += len(ch.elems)
			}
		}
		for _, ch := range f.portElements(ports) {
			want[ch.set] += len(ch.elems)
		}
		for _, name := range allSets {
			el, err := c.GetSetElements(&nftables.Set{Table: tab, Name: name})
			if err != nil || len(el) != want[name] {
				return false, err
			}
		}
	}
	return true, nil
}

// counter renders the rules into a connection that is never flushed, to know
// how many there should be.
type counter struct{ rules int }

func (k *counter) count(t *Table, c *nftables.Conn, tab *nftables.Table, f family) {
	var id uint32
	w := &writer{c: c, tab: tab, f: f, id: &id, sets: map[string]*nftables.Set{}}
	for _, s := range allSets {
		w.sets[s] = &nftables.Set{Name: s, ID: 1}
	}
	t.chains(w, f)
	k.rules = w.rules
}

// Probe tells whether the kernel can duplicate packets, by asking it to take
// a rule that does.
func (t *Table) Probe() error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("cannot open nftables: %w", err)
	}
	tab := c.AddTable(&nftables.Table{Name: t.name + "_probe", Family: nftables.TableFamilyIPv4})
	ch := c.AddChain(&nftables.Chain{Name: "probe", Table: tab})
	w := &writer{f: ip4}
	c.AddRule(&nftables.Rule{Table: tab, Chain: ch, Exprs: w.dup(&Injection{OutIndex: 1, To4: loopback4})})
	c.DelTable(tab)
	if err := c.Flush(); err != nil {
		return errors.Join(ErrNoInjection, err)
	}
	return nil
}
