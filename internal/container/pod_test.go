package container

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestPodRoundTrip(t *testing.T) {
	p := &Pod{Version: PodVersion, ID: strings.Repeat("ab", 32), Name: "n", Namespace: "ns", UID: "u", Attempt: 2, Created: time.Now().UTC().Round(0), Ready: true, BootID: "b",
		Network: NamespacePod, IPC: NamespaceHost, PID: NamespaceContainer, UserNS: UserNS{Host: 1000, Size: 65536}, Ports: []PodPort{{"tcp", netip.MustParseAddr("::1"), 1, 2}},
		Labels: map[string]string{"a": "b"}, IPs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}, Edge: []byte{1, 2, 3}}
	b, err := p.Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := DecodePod(b)
	if err != nil || !reflect.DeepEqual(got, p) {
		t.Errorf("%v\n%+v\n%+v", err, got, p)
	}
}

func FuzzDecodePod(f *testing.F) {
	f.Add([]byte(`{"Version":1,"ID":"` + strings.Repeat("ab", 32) + `","Network":"pod","IPC":"pod","PID":"host"}`))
	f.Add([]byte(`{"Version":9}`))
	f.Add([]byte(`[`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if p, err := DecodePod(b); err == nil && (!ValidID(p.ID) || p.Network == "" || p.IPC == "" || p.PID == "" || p.PID == NamespaceTarget) {
			t.Errorf("accepted %q", b)
		}
	})
}
