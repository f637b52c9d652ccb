package oci

import (
	"os"
	"path/filepath"
	"testing"
)

func BenchmarkGenerate(b *testing.B) {
	in := testInput()
	in.Seccomp = NewProfiles(nil)
	ApplyDefaults(in.HostConfig, in.Host, Defaults{})
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := Generate(in); err != nil {
			b.Fatal(err)
		}
	}
}
func BenchmarkLookupUser(b *testing.B) {
	dir := b.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "etc"), 0o755); err != nil {
		b.Fatal(err)
	}
	for n, s := range map[string]string{"passwd": passwdFile, "group": groupFile} {
		if err := os.WriteFile(filepath.Join(dir, "etc", n), []byte(s), 0o644); err != nil {
			b.Fatal(err)
		}
	}
	root, err := os.Open(dir)
	if err != nil {
		b.Fatal(err)
	}
	defer root.Close()
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := LookupUser(root, "", nil); err != nil {
			b.Fatal(err)
		}
	}
}
