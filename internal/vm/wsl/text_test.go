package wsl

import (
	"strings"
	"testing"
	"unicode/utf16"
)

func TestPlace(t *testing.T) {
	for in, want := range map[string]string{
		`C:\Users\ada`: "/mnt/c/Users/ada", `d:\`: "/mnt/d", `C:/Users/ada/x y`: "/mnt/c/Users/ada/x y", `C:\Users\ada\`: "/mnt/c/Users/ada",
		`\\server\share`: "", `C:Users`: "", `C:\..\x`: "", `/home/ada`: "", `1:\x`: "", `C:\a|b`: "", "": "", `\\?\C:\x`: "", `C:\a:stream`: "",
	} {
		got, err := Place(in)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q %v, want %q", in, got, err, want)
		}
	}
	for in, want := range map[string]string{
		"/mnt/c/Users/ada": `C:\Users\ada`, "/mnt/d": `D:\`, "/mnt/wsl/x": "", "/home": "", "/mnt/c/../d": "", "/mnt/c/a//b": "", `/mnt/c/a\b`: "", "/mnt/c/a:b": "",
	} {
		got, err := Origin(in)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q %v, want %q", in, got, err, want)
		}
	}
}

func FuzzPlace(f *testing.F) {
	for _, s := range []string{`C:\Users\ada`, `c:/x/../y`, `Z:\`, "/mnt/c/x", `\\a\b`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := Place(s)
		if err != nil {
			return
		}
		if !strings.HasPrefix(p, "/mnt/") || strings.Contains(p, "//") || strings.Contains(p+"/", "/../") {
			t.Fatalf("%q is at %q", s, p)
		}
		o, err := Origin(p)
		if err != nil {
			t.Fatalf("%q has no origin: %v", p, err)
		}
		if again, err := Place(o); err != nil || again != p {
			t.Fatalf("%q, %q, %q: %v", p, o, again, err)
		}
	})
}

func TestDecode(t *testing.T) {
	wide := func(s string, mark bool) []byte {
		var b []byte
		if mark {
			b = []byte{0xff, 0xfe}
		}
		for _, u := range utf16.Encode([]rune(s)) {
			b = append(b, byte(u), byte(u>>8))
		}
		return b
	}
	for _, in := range [][]byte{[]byte("größe\n"), []byte("\xef\xbb\xbfgröße\n"), wide("größe\n", true), wide("größe\n", false)} {
		if got := decode(in); got != "größe\n" {
			t.Errorf("%q: %q", in, got)
		}
	}
	if got := version("WSL-Version: 2.4.13.0\nKernelversion: 5.15.167.4-1"); got != "2.4.13.0" {
		t.Errorf("version %q", got)
	}
	if got := version("Copyright (c) Microsoft Corporation."); got != "" {
		t.Errorf("version %q", got)
	}
}
