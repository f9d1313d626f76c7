"""Starting, watching and ending ranks; the public interface is :mod:`multicard.launch`."""
