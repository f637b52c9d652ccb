package config

import "testing"

// FuzzLastGood reads what may be on a disk: what comes out of it is a name, links and servers like any document's.
func FuzzLastGood(f *testing.F) {
	for _, s := range []string{"version: 1\n", "version: 1\nhostname: x\nengine: {listen: [\"tcp://:1\"], tls: {cert: /c}}\n", "version: 1\nnetwork: {links: [{name: eth0, addresses: [10.0.0.1/8]}]}\nx: y\n", "- a", "\x00", "version: 1\nnetwork: 7\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		d, a, err := LastGood(b)
		if err != nil {
			return
		}
		if d.check() != nil || d.Install != nil || d.Encryption.Passphrase != "" || d.Encryption.Key != "" || d.DebugShell != (DebugShell{}) || d.Sysctl != nil {
			t.Errorf("%+v", d)
		}
		for _, l := range a.Listen {
			if l == "" {
				t.Error("an empty address")
			}
		}
	})
}
