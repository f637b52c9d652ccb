package network

import (
	"errors"
	"net/netip"
	"os"

	"github.com/cloudos-io/cloudos/internal/network/relay"
)

// relayed tells whether what reaches a port's own socket is carried on by the
// relay. Where the kernel translates, only connections to ::1 do.
func (m *Manager) relayed(k portKey) bool {
	return m.relay != nil && k.proto == "tcp" && k.host.Is6()
}

func (k portKey) addr() netip.AddrPort { return netip.AddrPortFrom(k.host, k.port) }

func (p published) route(k portKey) relay.Port {
	return relay.Port{Host: k.addr(), To: netip.AddrPortFrom(p.To, p.Container)}
}

// untranslated: the families differ, so that the relay alone serves the port.
func (p published) untranslated() bool { return p.Host.Is6() && p.To.Is4() }

// carry gives a reserved port to the relay. A port that only lacks ::1 is worth
// more than none.
func (m *Manager) carry(p published, k portKey) {
	if !m.relayed(k) {
		return
	}
	if err := m.relay.Add(p.route(k), m.ports.socket(k)); err != nil {
		m.ports.mute(k)
		m.log.Warn("a published port cannot be reached at ::1", "port", k.String(), "cause", err)
	}
}

// retake takes a port over from the relay that a former engine left.
func (m *Manager) retake(p published, k portKey) bool {
	if !m.relayed(k) {
		return false
	}
	fd, err := m.relay.Take(p.route(k))
	if err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			m.log.Warn("a published port could not be taken back from the relay", "port", k.String(), "cause", err)
		}
		return false
	}
	m.ports.adopt(k, fd)
	return true
}

// drop takes a port from the relay.
func (m *Manager) drop(k portKey) error {
	if !m.relayed(k) {
		return nil
	}
	return m.relay.Delete(k.addr())
}
